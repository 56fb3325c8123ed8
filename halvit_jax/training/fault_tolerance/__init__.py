"""Fault tolerance: preemption, stalls, non-finite values, gradient spikes."""
