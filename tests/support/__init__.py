"""What tests share: small models, tiny jobs, processes that talk to each other, golden cases, the emulator."""
