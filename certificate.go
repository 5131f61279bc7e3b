package plugin

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"time"
)

// This file has the certificates of AutoMTLS. Each side makes its own and trusts only that
// of the other: the host's goes with the environment, the plugin's with the handshake.

// newCertificate makes a certificate for AutoMTLS, for one start. P-256 is the fastest
// kind of key that go-plugin accepts.
func newCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "localhost"},
		DNSNames:              []string{"localhost"},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.AddDate(30, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// mutualTLS returns the configuration of one side. It trusts only the certificate of
// the peer.
func mutualTLS(own tls.Certificate, peer *x509.CertPool) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{own},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    peer,
		RootCAs:      peer,
		ServerName:   "localhost",
		MinVersion:   tls.VersionTLS12,
	}
}

// answerMutualTLS makes the certificate of the plugin and returns it, as DER, with the
// configuration of the plugin's side.
func answerMutualTLS(hostPEM string) (config *tls.Config, der []byte, err error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(hostPEM)) {
		return nil, nil, errors.New("the host has sent no certificate that can be read")
	}
	own, err := newCertificate()
	if err != nil {
		return nil, nil, err
	}
	return mutualTLS(own, pool), own.Certificate[0], nil
}
