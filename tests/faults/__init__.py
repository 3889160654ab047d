"""What happens around a run: kills, full disks, damaged states, files that other programs hold, signals."""
