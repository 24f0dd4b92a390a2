"""What reading, decoding and learning cost beside other ways to do them: one random model, measured in turns."""
