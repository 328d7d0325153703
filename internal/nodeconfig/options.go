package nodeconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"flotilla/internal/text"
)

// Option is one field of a Config seen as a flag.
type Option struct {
	Name  string // without dashes
	Usage string
	Value *Value
}

// Value reads and writes one field of a Config as text. It has the methods that
// flag packages ask for.
type Value struct {
	field reflect.Value
	given bool // a list was set: further values are added to it
}

// String returns the field as a flag's argument: lists are joined by commas.
func (v *Value) String() string {
	if v == nil || !v.field.IsValid() {
		return ""
	}
	if list, ok := v.field.Interface().([]string); ok {
		return strings.Join(list, ",")
	}
	return fmt.Sprint(v.field.Interface())
}

// entries returns the entries of a list, or the one value of another field.
func (v *Value) entries() []string {
	if list, ok := v.field.Interface().([]string); ok {
		return list
	}
	return []string{v.String()}
}

// Type returns the word that stands for the argument in help texts.
func (v *Value) Type() string {
	switch v.field.Kind() {
	case reflect.Int:
		return "number"
	case reflect.Bool:
		return "bool"
	case reflect.Slice:
		return "list"
	default:
		return "text"
	}
}

// Set writes the field. The first Set of a list replaces what it held, further
// ones add to it; commas separate several values.
func (v *Value) Set(text string) error {
	switch v.field.Kind() {
	case reflect.Int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return errors.New("not a number")
		}
		v.field.SetInt(int64(n))
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return errors.New("neither true nor false")
		}
		v.field.SetBool(b)
	case reflect.Slice:
		if !v.given {
			v.field.Set(reflect.Zero(v.field.Type()))
		}
		v.given = true
		for item := range strings.SplitSeq(text, ",") {
			if item = strings.TrimSpace(item); item != "" {
				v.field.Set(reflect.Append(v.field, reflect.ValueOf(item)))
			}
		}
	default:
		v.field.SetString(text)
	}
	return nil
}

// Options returns the fields of c as flags, in the order of the struct.
func (c *Config) Options() []Option {
	var list []Option
	s := reflect.ValueOf(c).Elem()
	for i := range s.NumField() {
		tag := s.Type().Field(i).Tag
		name := tag.Get("flag")
		if name == "" {
			name = tag.Get("yaml")
		}
		list = append(list, Option{name, tag.Get("help"), &Value{field: s.Field(i)}})
	}
	return list
}

// option returns the option of that name.
func (c *Config) option(name string) (Option, bool) {
	options := c.Options()
	if i := slices.IndexFunc(options, func(o Option) bool { return o.Name == name }); i >= 0 {
		return options[i], true
	}
	return Option{}, false
}

// EnvironmentName returns the variable that sets an option.
func EnvironmentName(option string) string {
	return "FLOTILLA_" + strings.ToUpper(strings.ReplaceAll(option, "-", "_"))
}

// Load returns the configuration that results from the defaults, then the
// configuration file, then the environment ("KEY=value"), then the flags: those
// fields of given for which changed reports true. Unknown keys in the file and
// unknown FLOTILLA_ variables are errors that name the nearest known one. The
// result is not validated.
func Load(given *Config, changed func(option string) bool, environ []string) (Config, error) {
	c := Default()
	c.ConfigFile = given.ConfigFile
	vars, err := variables(environ)
	if err != nil {
		return c, err
	}
	if file := vars["config"]; !changed("config") && file != "" {
		c.ConfigFile = file
	}
	if c.ConfigFile != "" {
		if err := c.readFile(c.ConfigFile); err != nil {
			return c, err
		}
	}
	flags := given.Options()
	for i, o := range c.Options() {
		if changed(o.Name) {
			o.Value.field.Set(flags[i].Value.field)
			continue
		}
		if text, ok := vars[o.Name]; ok {
			if err := o.Value.Set(text); err != nil {
				return c, fmt.Errorf("environment: %s=%q: %w", EnvironmentName(o.Name), text, err)
			}
		}
	}
	return c, nil
}

// foreign are variables that are no settings of a node and yet may be there: those
// that the command line reads, and those that units are given.
var foreign = []string{
	"FLOTILLA_CLUSTER", "FLOTILLA_ENDPOINT", "FLOTILLA_TUNNEL", "FLOTILLA_SSH_USERNAME", "FLOTILLA_SSH_TIMEOUT",
	"FLOTILLA_STRICT_HOST_KEY_CHECKING", "FLOTILLA_KNOWN_HOSTS_FILE", "FLOTILLA_SSH_IDENTITY",
	"FLOTILLA_UNIT", "FLOTILLA_MACHINE", "FLOTILLA_EPOCH",
}

// variables returns the settings in environ by option. An empty variable is as good
// as none.
func variables(environ []string) (map[string]string, error) {
	known := map[string]string{}
	for _, o := range new(Config).Options() {
		known[EnvironmentName(o.Name)] = o.Name
	}
	vars := map[string]string{}
	var found []error
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		option, ok := known[name]
		switch {
		case ok && value != "":
			vars[option] = value
		case !ok && strings.HasPrefix(name, "FLOTILLA_") && !slices.Contains(foreign, name):
			found = append(found, fmt.Errorf("environment: %s is not a setting of this program%s", name, didYouMean(name, slices.Sorted(maps.Keys(known)))))
		}
	}
	return vars, errors.Join(found...)
}

// readFile reads a yaml file over c.
func (c *Config) readFile(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	return c.read(path, raw)
}

// read reads the text of a yaml file over c; errors call it by its path.
func (c *Config) read(path string, raw []byte) error {
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil // an empty file sets nothing
	} else if err != nil {
		return fmt.Errorf("%s: %s", path, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: holds more than one document; keep one", path)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: not a list of settings; write lines such as \"http-port: 8080\"", path, root.Line)
	}
	return c.readSettings(path, root.Content)
}

// readSettings reads the pairs of key and value nodes of a yaml mapping.
func (c *Config) readSettings(path string, pairs []*yaml.Node) error {
	var known []string
	for _, o := range c.Options() {
		known = append(known, o.Name)
	}
	var found []error
	seen := map[string]int{}
	for i := 0; i+1 < len(pairs); i += 2 {
		key, value := pairs[i], pairs[i+1]
		complain := func(line int, format string, args ...any) {
			found = append(found, fmt.Errorf("%s:%d: %w", path, line, fmt.Errorf(format, args...)))
		}
		o, _ := c.option(key.Value)
		switch {
		case !IsSetting(key.Value):
			complain(key.Line, "unknown setting %q%s", key.Value, didYouMean(key.Value, known))
			continue
		case seen[key.Value] != 0:
			complain(key.Line, "%s is already set in line %d", key.Value, seen[key.Value])
			continue
		}
		seen[key.Value] = key.Line
		if o.Value.Type() == "list" && value.Kind == yaml.ScalarNode {
			_ = o.Value.Set(value.Value) // a list takes any text
		} else if err := value.Decode(o.Value.field.Addr().Interface()); err != nil {
			complain(value.Line, "%s: %q is not a %s", key.Value, value.Value, o.Value.Type())
		}
	}
	return errors.Join(found...)
}

// didYouMean returns "; did you mean X?" for the known word nearest to word, or
// "" if none is near.
func didYouMean(word string, known []string) string {
	near := text.Nearest(word, known)
	if near == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %s?", near)
}
