"""What was measured, as one page that can be mailed: tables, plots and conditions, without outside resources."""
