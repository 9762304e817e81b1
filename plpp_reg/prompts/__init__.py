"""What one does with a trained prompt: inspect, predict, export."""
