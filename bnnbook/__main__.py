from bnnbook.cli import main

main()
