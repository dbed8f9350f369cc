"""What a delivered model takes and how right its files are, measured here."""
