"""Many runs from one command: what came out of them, and a search that learns from them."""
