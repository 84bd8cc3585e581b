"""Models handed to other libraries."""
