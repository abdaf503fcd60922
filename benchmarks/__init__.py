"""Measures distlock beside its peers and beside the limit of the servers: ``make bench``.

``__main__`` starts private servers and hands them to the workloads. A workload runs each contender
in fresh processes (``processes``, ``worker``), one after the other, round by round, and returns
figures. ``report`` sets them as ratios against the raw lease of the same run, ``targets`` says what
must be reached, and ``plot`` draws them. Nothing here uses more of distlock than a user would.
"""
