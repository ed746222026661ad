"""Files and messages changed at random: what to change, who reads it, and what an accepted one must be."""
