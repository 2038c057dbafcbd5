"""What `nemo_trd.prefix_failure` measures, and how it is put together."""
