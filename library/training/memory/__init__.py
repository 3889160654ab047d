"""How much memory a run will need, told before a weight is read: `plan.plan_of`, and the table of it."""
