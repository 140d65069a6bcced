"""What the commands run: one stage of a run a file, each given a session, and a reporter that it speaks through."""
