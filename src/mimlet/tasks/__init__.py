"""What is trained and judged with labels."""
