package plugin

import (
	"fmt"
	"testing"
)

// The last of many errors of one call can be found, and not all are kept.
func TestManyCallErrors(t *testing.T) {
	errs := &callErrors{}
	var name string
	var last error
	for i := range 3*maxCallErrors + 1 {
		last = fmt.Errorf("error %d", i)
		name = errs.add(last)
	}
	if errs.find(name) != last {
		t.Errorf("the last error is %v", errs.find(name))
	}
	if kept := len(errs.byName); kept > maxCallErrors {
		t.Errorf("%d errors are kept", kept)
	}
}
