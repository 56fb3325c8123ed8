"""Faults a run survives or reports: preemption, stalls, values that are not finite, gradient spikes."""
