"""Whether a run can work in a place: python -m nemo_trd.doctor."""
