"""What a Hugging Face directory is, without torch."""
