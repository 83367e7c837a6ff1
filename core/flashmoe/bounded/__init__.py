"""Run functions on hostile input in helper processes, within limits of time and memory."""
