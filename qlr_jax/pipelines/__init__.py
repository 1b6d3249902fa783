"""What the other commands do, and the stages that a job is made of."""
