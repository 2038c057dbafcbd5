"""What surrounds the loop."""
