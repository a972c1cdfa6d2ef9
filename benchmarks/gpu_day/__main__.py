from benchmarks.gpu_day import main


main()
