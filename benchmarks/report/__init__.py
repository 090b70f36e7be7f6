"""`bench report`: what each variant costs in memory, time and fidelity on this machine, and how that is shown."""
