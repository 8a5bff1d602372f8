"""The benchmark: clips x camera paths x speeds x methods, every metric of every case, tables and a report."""
