"""Encoders with taps, decoders, teachers, and their weights."""
