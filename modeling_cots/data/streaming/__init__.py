"""Data sets read as a stream of shards: WebDataset tar files, parquet and jsonl files, also over the network."""
