"""The durable record of runs: folder, events, queue, costs. No torch."""
