"""The parts of `nemo_trd.report`: records read, figures drawn, samples marked, one page."""
