// Reads cases {template, system, messages, tools, functions} as JSON, writes what text/template makes of each.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type call struct {
	Function struct{ Name, Arguments string }
}

type message struct {
	Role, Content string
	ToolCalls     []call
}

// A tool is shown as JSON, as Ollama's own type is.
type shown string

func (s shown) String() string { return string(s) }

type tool struct {
	whole    string
	Function shown
}

func (t tool) String() string { return t.whole }

type oneCase struct {
	Template, System string
	Messages         []message
	Tools, Functions []string
}

func main() {
	var cases []oneCase
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	texts := []string{}
	for _, c := range cases {
		tools := []tool{}
		for i := range c.Tools {
			tools = append(tools, tool{c.Tools[i], shown(c.Functions[i])})
		}
		parsed, err := template.New("").Option("missingkey=zero").Parse(c.Template)
		var out strings.Builder
		if err == nil {
			err = parsed.Execute(&out, map[string]any{"System": c.System, "Messages": c.Messages, "Tools": tools})
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		texts = append(texts, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
