"""Data for continual pretraining, fine-tuning and recall tests."""
