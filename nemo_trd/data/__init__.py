"""Problems in, records through."""
