"""What `real_model.py` is made of: the study and what it keeps, the peers, the tables and pictures."""
