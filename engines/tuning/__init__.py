"""What engines in torch that train adapters share: adapters in memory and in files, passes over the data of many runs,
losses of log-probs, the optimizer. It knows no model and no plugin."""
