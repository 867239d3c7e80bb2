"""What ranks exchange: chunk parallelism over time, tensor parallelism over features. Knows no host."""
