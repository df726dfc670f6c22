// The process that holds a pod's namespaces: it waits to be told to end. With -v, as in the job by which kubeadm tries a cluster before
// it upgrades it, it ends at once.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "-v" {
		fmt.Println("llmtrace pause")
		return
	}
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGINT, syscall.SIGTERM)
	<-told
}
