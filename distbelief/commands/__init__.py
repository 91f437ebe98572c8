"""The commands of `distbelief`, one file for each group. Nothing heavy is imported at their top."""
