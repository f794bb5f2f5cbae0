"""What a training achieved: comparison with the reference, best-of-n, statistics, reports, plots, and the doctor.

Nothing here trains.
"""
