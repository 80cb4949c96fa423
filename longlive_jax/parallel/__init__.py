"""Work spread over several devices."""
