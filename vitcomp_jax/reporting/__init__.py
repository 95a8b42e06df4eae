"""Reports and plots of results, plans and models; independent of the stages."""
