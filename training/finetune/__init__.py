"""`python -m training` on a model and data of your own: a run of TRL's `SFTTrainer`."""
