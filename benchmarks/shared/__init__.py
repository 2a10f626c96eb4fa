"""What several benchmarks share: sides that take turns, workloads, and processes that serve as yardsticks."""
