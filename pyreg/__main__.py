from pyreg import show_config

show_config()
