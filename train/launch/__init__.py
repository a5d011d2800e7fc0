"""Places where a training job can run: what is submitted there, and with which tool."""
