"""What a layout costs before it runs: memory, traffic, time of a step."""
