"""What `mimlet plan` knows, counts and measures."""
