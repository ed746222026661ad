"""Settings times attacks: recorded, attacked, scored and tabled, and the verdicts that follow."""
