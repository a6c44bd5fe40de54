"""What a run is: settings, choices, families, run folders and events. No torch, so that it imports fast."""
