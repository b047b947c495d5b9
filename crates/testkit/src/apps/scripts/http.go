// server PORT FILE: serves the file, and says the sum of what is sent to it.
// client PORT FILE: compares; over one connection, over many, and without keep-alive.
package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

func main() {
	port, file := os.Args[2], os.Args[3]
	data, err := os.ReadFile(file)
	if err != nil {
		log.Fatal(err)
	}
	if os.Args[1] == "server" {
		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" {
				body, err := io.ReadAll(r.Body)
				if err != nil {
					log.Print(err)
				}
				fmt.Fprintf(w, "%x", sha256.Sum256(body))
				return
			}
			w.Write(data)
		})
		go func() {
			stop := make(chan os.Signal, 1)
			signal.Notify(stop, syscall.SIGTERM)
			<-stop
			os.Exit(0)
		}()
		log.Fatal(http.ListenAndServe("127.0.0.1:"+port, nil))
	}
	url := "http://127.0.0.1:" + port + "/"
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	get := func(client *http.Client) {
		response, err := client.Get(url)
		if err != nil {
			log.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || !bytes.Equal(body, data) {
			log.Fatal("another file: ", len(body), err)
		}
	}
	kept := &http.Client{Timeout: 20 * time.Second}
	short := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	var all sync.WaitGroup
	for i := 0; i < 20; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			for j := 0; j < 5; j++ {
				get(kept)
				get(short)
			}
		}()
	}
	all.Wait()
	response, err := kept.Post(url, "application/octet-stream", bytes.NewReader(data))
	if err != nil {
		log.Fatal(err)
	}
	answer, err := io.ReadAll(response.Body)
	if err != nil || string(answer) != sum {
		log.Fatal("another sum: ", string(answer), err)
	}
	if _, err := http.Get("http://127.0.0.1:1/"); err == nil {
		log.Fatal("a closed port answers")
	}
	fmt.Println("ok")
}
