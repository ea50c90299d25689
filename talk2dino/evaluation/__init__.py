"""What an evaluation leaves behind, for people."""
