"""What is below RUN_DIR: writing and reading it."""
