"""What is run: models on their data, blocks, the processes that do them."""
