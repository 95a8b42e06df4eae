"""Reports and plots of results, plans and models; knows no stage."""
